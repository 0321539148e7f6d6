# shellcheck shell=bash
# Sourced by the launch scripts: errors, quoting, flags, and running a command or, with --dry-run, printing it.

fail() { # one line, exit status 2
    echo "error: $*" >&2
    exit 2
}

say() {
    echo "[launch] $*" >&2
}

quoted() { # its words as one line that a shell reads back as the same words
    local word rest line=""
    for word in "$@"; do
        case "$word" in
            "" | *[!A-Za-z0-9_./:=,@%+-]*)
                rest="$word"
                word="'"
                while [[ "$rest" == *"'"* ]]; do # the quote itself: leave the quotes, escape it, enter again
                    word+="${rest%%"'"*}'\\''"
                    rest="${rest#*"'"}"
                done
                word+="$rest'"
                ;;
        esac
        line+=" $word"
    done
    printf '%s' "${line# }"
}

# parse_flags VALUES SWITCHES ARGUMENTS...: assigns --name=value to the variable name for each name in VALUES, yes to the
# variables in SWITCHES, and gathers --env=NAME=VALUE in environment and the words after -- in train_flags. The caller
# declares the variables and has a function usage. The locals begin with _, because flags have names like name.
parse_flags() {
    local _values="$1" _switches="$2" _flag
    shift 2
    environment=()
    train_flags=()
    while [ $# -gt 0 ]; do
        _flag="${1%%=*}"
        _flag="${_flag#--}"
        _flag="${_flag//-/_}"
        case "$1" in
            --)
                shift
                train_flags=("$@")
                return
                ;;
            --help)
                usage
                exit 0
                ;;
            --env=[A-Za-z_]*=*) environment+=("${1#--env=}") ;;
            --env | --env=*) fail "$1: the form is --env=NAME=VALUE" ;;
            --*=*)
                case " $_values " in *" $_flag "*) ;; *) refuse_flag "$1" "$_values" "$_switches" ;; esac
                [ -n "${1#*=}" ] || fail "$1 has no value"
                printf -v "$_flag" '%s' "${1#*=}"
                ;;
            --*)
                case " $_values " in *" $_flag "*) fail "$1 has no value; write $1=..." ;; esac
                case " $_switches " in *" $_flag "*) ;; *) refuse_flag "$1" "$_values" "$_switches" ;; esac
                printf -v "$_flag" yes
                ;;
            *) fail "'$1' is no flag; flags of train.py come after --, and --help lists the others" ;;
        esac
        shift
    done
}

refuse_flag() { # refuse_flag FLAG VALUES SWITCHES
    local _flag allowed=""
    for _flag in $2; do allowed+=" --$_flag="; done
    for _flag in $3; do allowed+=" --$_flag"; done
    fail "${1%%=*}: there is no such flag here; allowed:${allowed//_/-} --help, and train.py's after --"
}

need() { # need FLAG...: fails unless each was given
    local _flag
    for _flag in "$@"; do
        [ -n "${!_flag}" ] || fail "--${_flag//_/-} is missing; --help says what it is"
    done
}

need_number() { # need_number FLAG...: fails unless each is a positive whole number
    local _flag
    for _flag in "$@"; do
        case "${!_flag}" in
            "" | *[!0-9]* | 0*) fail "--${_flag//_/-}=${!_flag}: not a positive whole number" ;;
        esac
    done
}

need_plain_name() { # need_plain_name NAME: clouds allow lower case letters, digits and -, beginning with a letter
    case "$1" in
        [!a-z]* | *[!a-z0-9-]* | *-) fail "--name=$1: lower case letters, digits and -, a letter first, no - at the end" ;;
    esac
    [ "${#1}" -le 40 ] || fail "--name=$1: ${#1} characters, at most 40"
}

# Sets workdir to the --workdir of train_flags. Every process writes there, and a restart resumes from there. It has no
# default, which would be on the disk of one machine.
need_workdir() {
    local i
    workdir=""
    for ((i = 0; i < ${#train_flags[@]}; i++)); do
        case "${train_flags[i]}" in
            --workdir=* | -workdir=*) workdir="${train_flags[i]#*=}" ;;
            --workdir | -workdir) workdir="${train_flags[i + 1]:-}" ;;
        esac
    done
    local allowed="a directory that all machines share, or gs://BUCKET/NAME (launch/README.md)"
    [ -n "$workdir" ] || fail "--workdir is missing after --; it must be $allowed"
    case "$workdir" in
        gs://?*/?*) ;;
        *://*) fail "--workdir=$workdir: must be $allowed" ;;
    esac
}

# take_command COMMANDS ARGUMENTS...: sets command, or ends with the help or an error that says what is allowed
take_command() {
    local allowed="$1"
    case "${2:-}" in
        --help)
            usage
            exit 0
            ;;
        "" | -*) fail "the command is missing before the flags; allowed: $allowed" ;;
    esac
    case " $allowed " in *" $2 "*) ;; *) fail "'$2' is no command; allowed: $allowed" ;; esac
    # shellcheck disable=SC2034  # the caller reads it
    command="$2"
}

confirm_name() { # confirm_name NAME WHAT: goes on only if the name was given twice, by --confirm or by hand
    [ -z "$dry_run" ] && [ "$confirm" != "$1" ] || return 0
    [ -z "$confirm" ] || fail "--confirm=$confirm is not the name $1; nothing was deleted"
    [ -t 0 ] || fail "delete needs --confirm=$1 where nobody can be asked"
    read -r -p "Type $1 to delete $2: " confirm
    [ "$confirm" = "$1" ] || fail "'$confirm' is not $1; nothing was deleted"
}

run() { # with --dry-run, prints the command instead
    if [ -n "$dry_run" ]; then
        printf '%s\n' "$(quoted "$@")"
    else
        say "$(quoted "$@")"
        "$@"
    fi
}
