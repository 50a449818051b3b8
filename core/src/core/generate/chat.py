"""What a user says, as the beginning of a chat in the words of the tokenizer's template."""

from datetime import date

from core.config.errors import UserError
from core.data.chat_template import ChatTemplate, TemplateError, encode
from core.data.tokenizer import Tokenizer


class ChatPrompts:
    """Turns what a user says into the ids of a chat, up to where the answer begins. Special tokens in it are text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `UserError` for a tokenizer without a chat template."""
        self.model = tokenizer.templating
        if (source := self.model.chat_templates.get("default")) is None:
            raise UserError("chat needs a chat template, and the tokenizer has none: leave --chat out")
        self.template = ChatTemplate(self.model, source, day=date.today().isoformat())

    def __call__(self, message: str) -> list[int]:
        """The ids. Raises `UserError` where the template refuses the message."""
        try:
            spans = self.template.prompt([{"role": "user", "content": message}])
        except TemplateError as error:
            raise UserError(f"--chat: {error}") from error
        return encode(self.model, spans)[0]
