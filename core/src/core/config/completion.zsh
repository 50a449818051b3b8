# Completion of Armature's programs in zsh. Keep the output in a file, and read that file in ~/.zshrc:
#     python -m qwen3.train --print-completion zsh > ~/.qwen3-train.zsh
#     echo '. ~/.qwen3-train.zsh' >> ~/.zshrc

_armature() {
    local i module flag word recipe current values most files offered
    integer given=0
    for ((i = 2; i + 1 < CURRENT; i++)); do
        if [[ $words[i] == -m || $words[i] == --module ]]; then
            module=$words[i+1]
            break
        fi
    done
    if [[ -z $module ]] || ((! $+functions[_armature_of_${module//./_}])); then
        ${_armature_before[$service]:-_default} "$@"
        return
    fi
    for ((i += 2; i <= CURRENT; i++)); do
        word=$words[i]
        if ((i == CURRENT)) && [[ $word != --*=* ]]; then break; fi
        case $word in
        --*) word=${word#--} flag=--${${word%%=*}//-/_} given=0 ;;
        *) given+=1 ;;
        esac
        if ((i < CURRENT)) && [[ $word == *=* ]]; then given=1 word=${word#*=}; fi
        if [[ $flag == --config && $given == 1 ]]; then recipe=${word//-/_}; fi
    done
    _armature_of_${module//./_} "$flag" "$recipe"
    current=$words[CURRENT]
    if [[ $current == --*=* ]]; then
        compset -P '*='
    elif [[ $current == -* ]]; then
        compadd -M 'm:{-_}={_-}' -- ${=offered}
        return
    fi
    if ((given < most)); then
        if [[ -n $flag || $given == 0 ]]; then compadd -- ${=values}; fi
        if [[ -n $files ]]; then _files; fi
    else
        compadd -- ${=offered}
    fi
}

if ((! $+functions[compdef])); then
    autoload -Uz compinit && compinit
fi
typeset -gA _armature_before
for _armature_name in @PROGRAMS@; do
    if [[ $_comps[$_armature_name] != _armature ]]; then
        _armature_before[$_armature_name]=$_comps[$_armature_name]
    fi
    compdef _armature $_armature_name
done
unset _armature_name
