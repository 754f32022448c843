# shellcheck shell=bash
# What the scripts that start a job share; they source it.
#
# A flag is --name=VALUE, --name VALUE or a switch --name; what follows `--` goes
# to pr1_jax.main. A mistake is one line that names the flag, and exit code 2.

if ((BASH_VERSINFO[0] < 5)); then
  echo "${0##*/}: bash 5 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
fi

shopt -s inherit_errexit # in $(...) too

declare -A FLAG=() # values by name; a switch that is set has the value 1
PROGRAM=()         # arguments of pr1_jax.main
ACTION=
ARGUMENTS=() # all but the action
DRY_RUN=0
BUNDLE=build/launch/pr1_jax.tar.gz
exec 3>&1 # where a dry run prints, also from within $(...)

say() { echo "${0##*/}: $*" >&2; }

fail() {
  say "$@"
  exit 2
}

# Prints the comment at the top of the script.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# Prints words such that any POSIX shell reads them back as they are.
quote() {
  local word line='' quoted="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/"$quoted"}'"
    fi
  done
  printf '%s\n' "${line# }"
}

# Runs a command that changes something; a dry run prints it instead.
run() {
  if ((DRY_RUN)); then
    quote "$@" >&3
  else
    echo "+ $(quote "$@")" >&2
    "$@"
  fi
}

# Runs a command whose output is wanted; a dry run prints it and gets no output.
ask() {
  if ((DRY_RUN)); then
    quote "$@" >&3
  else
    "$@"
  fi
}

# Prints a result, which a dry run has not.
report() { ((DRY_RUN)) || echo "$@"; }

# Reads the command line: parse "FLAGS WITH VALUES" "SWITCHES" "$@"
parse() {
  local values=" $1 " switches=" $2 " arg name
  shift 2
  while (($#)); do
    arg=$1
    shift
    name=${arg%%=*}
    name=${name#--}
    case $arg in
      --)
        PROGRAM=("$@")
        ARGUMENTS+=(-- "$@")
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --*)
        if [[ $switches == *" $name "* && $arg == "--$name" ]]; then
          FLAG[$name]=1
        elif [[ $values != *" $name "* ]]; then
          fail "unknown flag $arg (flags of pr1_jax.main go behind --)"
        elif [[ $arg == *=* ]]; then
          FLAG[$name]=${arg#*=}
        elif (($#)); then
          FLAG[$name]=$1
          ARGUMENTS+=("$arg" "$1")
          shift
          continue
        else
          fail "--$name needs a value"
        fi
        ;;
      *)
        [[ -z $ACTION ]] || fail "unexpected argument $arg behind $ACTION"
        ACTION=$arg
        continue
        ;;
    esac
    ARGUMENTS+=("$arg")
  done
}

# Stops unless all of these flags have values.
need() {
  local name
  for name in "$@"; do
    [[ -n ${FLAG[$name]:-} ]] || fail "--$name is missing"
  done
}

# Stops unless these flags, where given, are whole numbers.
need_numbers() {
  local name
  for name in "$@"; do
    [[ ${FLAG[$name]:-0} =~ ^[0-9]+$ ]] || fail "--$name=${FLAG[$name]} is no number"
  done
}

# Prints the value of a flag of pr1_jax.main, if it was given.
program_flag() {
  local i
  for ((i = 0; i < ${#PROGRAM[@]}; i++)); do
    case ${PROGRAM[i]} in
      "--$1="*) printf '%s\n' "${PROGRAM[i]#*=}" ;;
      "--$1") printf '%s\n' "${PROGRAM[i + 1]:-}" ;;
    esac
  done
}

# Stops unless pr1_jax.main gets a config, and a workdir that all hosts can see.
need_program() {
  local name workdir arg
  for name in config workdir; do
    [[ -n $(program_flag "$name") ]] || fail "--$name is missing behind --"
  done
  workdir=$(program_flag workdir)
  [[ $workdir == /* ]] ||
    fail "--workdir=$workdir: all hosts must see it, so name the absolute path of a" \
      "shared folder, or of a bucket that they have mounted (gcsfuse); checkpoints" \
      "alone can go to a bucket: --config.checkpoint.folder=gs://…"
  for arg in "${PROGRAM[@]}"; do
    [[ $arg != *$'\n'* ]] || fail "${arg%%$'\n'*}... holds a line break"
  done
}

# Packs the tracked files as they are now and sets STAMP to their hash. A private
# index and object folder leave the repository as it was.
pack() {
  local folder objects
  if ((DRY_RUN)); then
    STAMP=STAMP
    quote git archive --format=tar.gz --output="$BUNDLE" HEAD >&3
    return
  fi
  [[ $(git rev-parse --show-toplevel 2>/dev/null) == "$(pwd -P)" ]] ||
    fail "$PWD is no git checkout, so what to copy is not known"
  mkdir -p "${BUNDLE%/*}"
  folder=$(mktemp -d "${BUNDLE%/*}/pack.XXXXXX")
  objects=$(realpath "$(git rev-parse --git-path objects)")
  cp "$(git rev-parse --git-path index)" "$folder/index"
  mkdir "$folder/objects"
  (
    export GIT_INDEX_FILE=$PWD/$folder/index GIT_OBJECT_DIRECTORY=$PWD/$folder/objects
    export GIT_ALTERNATE_OBJECT_DIRECTORIES=$objects
    git add --update
    git write-tree >"$folder/tree"
    git archive --format=tar.gz --output="$BUNDLE" "$(<"$folder/tree")"
  )
  STAMP=$(<"$folder/tree")
  rm -rf "$folder"
}

# The commands below are for a host's shell, in its home folder.

installed_command() { echo "echo installed=\$(cat pr1_jax/.venv/checkout 2>/dev/null)"; }

state_command() { echo "bash pr1_jax/launch/host.sh state 2>/dev/null || echo state=none"; }

# Puts the bundle in place of the last one and sets up: install_command gpu
install_command() {
  local script host=pr1_jax/launch/host.sh
  local steps=(
    "set -e"
    "if [ -e $host ] && [ \"\$(bash $host state)\" = state=running ]"
    "then echo 'a job is running here: stop it first' >&2"
    "exit 1"
    "fi"
    "mkdir -p pr1_jax"
    "rm -f pr1_jax/.venv/checkout"
    "find pr1_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
    "tar -xzf ${BUNDLE##*/} -C pr1_jax"
    "bash $host setup $1 $STAMP"
  )
  printf -v script '%s; ' "${steps[@]}"
  quote bash -c "${script%; }"
}

# Starts the job: start_command PROGRAM ARGUMENTS...
start_command() {
  quote bash pr1_jax/launch/host.sh start --restarts="${FLAG[restarts]:-20}" \
    --backoff-sec="${FLAG[backoff-sec]:-10}" \
    ${FLAG[unless-stopped]:+--unless-stopped} -- "$@"
}

stop_command() {
  quote bash pr1_jax/launch/host.sh stop --grace-sec="${FLAG[grace-sec]:-300}"
}

# Whether all of the hosts that answered have the present checkout.
is_installed() { # lines "installed=STAMP"
  grep -q '^installed=' <<<"$1" &&
    ! grep '^installed=' <<<"$1" | grep -qvFx "installed=$STAMP"
}

# What a job is, from lines "state=..." of its hosts. A host that lost it is to
# start it again, which does nothing where it runs.
judge() {
  local state
  for state in wrong stopped failed interrupted none unreachable running finished; do
    if grep -qFx "state=$state" <<<"$1"; then
      echo "$state"
      return
    fi
  done
  echo unreachable
}

# Keeps a job alive until it ends. Needs the functions `is_there` (have the hosts
# not been taken away?) and `states`, and the actions named: watch create install run
watch() {
  local verdict=none begun=0
  while true; do
    if [[ $verdict == running || $verdict == unreachable ]] && ! is_there; then
      say "the machines are gone: making them again"
      verdict=none
    fi
    case $verdict in
      finished | stopped)
        say "the job has $verdict"
        return
        ;;
      wrong) fail "a wrong config or flag: see the log" ;;
      failed)
        say "the job failed more often than --restarts: see the log"
        exit 1
        ;;
      none | interrupted)
        if do_steps "$@" && ((begun == 0)); then
          begun=1 # by us, so that a `stop` from now on is meant for us
          ARGUMENTS=(--unless-stopped "${ARGUMENTS[@]}")
        fi
        ;;
    esac
    if ((DRY_RUN)); then
      states
      return
    fi
    sleep "${FLAG[poll-sec]:-60}"
    if ((begun)); then
      verdict=$(judge "$(states)")
      say "the job is: $verdict"
    fi
  done
}

# Runs actions, each in a process of its own, so that a failure ends that alone.
do_steps() {
  local step status
  for step in "$@"; do
    status=0
    if ((DRY_RUN)); then
      "do_$step"
    else
      bash "$0" "$step" "${ARGUMENTS[@]}" || status=$?
    fi
    ((status != 2)) || exit 2
    if ((status)); then
      say "$step failed with exit code $status: again in a while"
      return 1
    fi
  done
}
