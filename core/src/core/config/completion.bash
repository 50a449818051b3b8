# Completion of Armature's programs in bash. Keep the output in a file, and read that file in ~/.bashrc:
#     python -m qwen3.train --print-completion bash > ~/.qwen3-train.bash
#     echo '. ~/.qwen3-train.bash' >> ~/.bashrc

_armature() {
    local i module= flag= word recipe= given=0 current values most files offered
    for ((i = 1; i + 1 < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} == -m || ${COMP_WORDS[i]} == --module ]]; then
            module=${COMP_WORDS[i + 1]}
            break
        fi
    done
    if [[ -z $module ]] || ! declare -F "_armature_of_${module//./_}" > /dev/null; then
        word=${_armature_before[${1##*/}]:-}
        if [[ -n $word ]]; then "$word" "$@"; fi
        return
    fi
    for ((i += 2; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
        =) ;;
        --*) word=${word:2} flag=--${word//-/_} given=0 ;;
        *)
            given=$((given + 1))
            if [[ $flag == --config && $given == 1 ]]; then recipe=${word//-/_}; fi
            ;;
        esac
    done
    current=${COMP_WORDS[COMP_CWORD]}
    if [[ $current == = ]]; then current=; fi
    "_armature_of_${module//./_}" "$flag" "$recipe"
    COMPREPLY=()
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$offered" -- "$current" || true))
        if [[ ${#COMPREPLY[@]} == 0 ]]; then # `-` and `_` are alike
            word=${current#--}
            COMPREPLY=($(compgen -W "$offered" -- "--${word//-/_}" || true))
        fi
    elif ((given < most)); then
        if [[ -z $flag && $given != 0 ]]; then values=; fi
        COMPREPLY=($(compgen -W "$values" -- "$current" || true))
        if [[ -z $files ]]; then compopt +o default +o bashdefault 2> /dev/null || true; fi
    elif [[ -z $current ]]; then
        COMPREPLY=($(compgen -W "$offered" -- -- || true))
    fi
}

_armature_take_over() {
    local name before
    declare -gA _armature_before
    for name in @PROGRAMS@; do # what bash-completion loads at the first tab, for several names at once
        if declare -F _comp_load > /dev/null; then
            _comp_load "$name" > /dev/null
        elif declare -F _completion_loader > /dev/null; then
            _completion_loader "$name" > /dev/null
        fi
    done
    for name in @PROGRAMS@; do
        before=$(complete -p "$name" 2> /dev/null) || true # a shell may end at what fails
        case $before in
        *' -F _armature '*) ;;
        *' -F '*) before=${before#* -F } _armature_before[$name]=${before%% *} ;;
        esac
        complete -o bashdefault -o default -F _armature "$name"
    done
}
_armature_take_over
