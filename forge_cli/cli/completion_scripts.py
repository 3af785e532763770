"""What `forge completion` prints for each shell: functions that ask Forge what may follow the words so far."""

from __future__ import annotations

from typing import NamedTuple

BASH = r"""# Completion of forge for bash. To have it in every shell: forge completion bash --install
_forge_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" current head mark
    local -a words
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    current="${words[${#words[@]}-1]}"
    local IFS=$'\n'
    COMPREPLY=($("${words[0]/#\~/$HOME}" completion words -- "${words[@]:1}" 2>/dev/null | cut -f1))
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[.=] ]] && compopt -o nospace 2>/dev/null
    # bash begins a new word behind these, and wants only what comes after the last one.
    for mark in = :; do
        if [[ "$COMP_WORDBREAKS" == *"$mark"* && "$current" == *"$mark"* ]]; then
            head="${current%"${current##*"$mark"}"}"
            COMPREPLY=("${COMPREPLY[@]#"$head"}")
            current="${current#"$head"}"
        fi
    done
}
complete -o default -F _forge_complete forge
"""
ZSH = r"""#compdef forge
# Completion of forge for zsh. To have it in every shell: forge completion zsh --install
_forge() {
    local line value
    local -a lines whole open whole_shown open_shown
    lines=("${(@f)$(${~words[1]} completion words -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    for line in $lines; do
        value="${line%%$'\t'*}"
        if [[ "$value" == *[.=] ]]; then
            open+=("$value") open_shown+=("${line/$'\t'/  -- }")
        else
            whole+=("$value") whole_shown+=("${line/$'\t'/  -- }")
        fi
    done
    (( $#whole )) && compadd -l -d whole_shown -a whole
    (( $#open )) && compadd -l -S '' -d open_shown -a open
    (( $#whole + $#open )) || _files
}
if [[ "$funcstack[1]" == "_forge" ]]; then _forge "$@"; else compdef _forge forge; fi
"""
FISH = r"""# Completion of forge for fish. To have it in every shell: forge completion fish --install
function __forge_complete
    set -l words (commandline -opc)
    set -l found (command $words[1] completion words -- $words[2..-1] (commandline -ct | string collect) 2>/dev/null)
    if test (count $found) -eq 0
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $found
    end
end
complete -c forge -f -a '(__forge_complete)'
"""


class Script(NamedTuple):
    """What one shell needs.

    Attributes:
        text: The script.
        place: File that the shell looks for, with ``{data}`` and ``{config}`` for the XDG folders.
        hint: What is left to do, with ``{file}``.
    """

    text: str
    place: str
    hint: str


_ZSH_HINT = "add to ~/.zshrc, then open a new shell: fpath=(~/.zfunc $fpath); autoload -Uz compinit; compinit"
_BASH_HINT = "open a new shell; without the bash-completion package, add to ~/.bashrc: . {file}"
SCRIPTS = {
    "bash": Script(BASH, "{data}/bash-completion/completions/forge", _BASH_HINT),
    "zsh": Script(ZSH, "~/.zfunc/_forge", _ZSH_HINT),
    "fish": Script(FISH, "{config}/fish/completions/forge.fish", "it works at once"),
}
