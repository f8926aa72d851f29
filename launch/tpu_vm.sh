#!/usr/bin/env bash
# A TPU VM (one host, a pod slice or several slices) from making it to deleting it, with gcloud.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh COMMAND [--FLAG=VALUE ...] [-- ARGUMENTS]

  create             make the VM and wait for it
  queue              ask for it when there is room (a queued resource); several slices: --slices=N
  status             of the queued resource
  copy               this folder, without .git, .venv and work_dirs, to ~/mgjax on all workers
  install            Python's packages there, in ~/mgjax/.venv
  train -- ARGS      launch/train.py ARGS on all workers, detached; its output in ~/mgjax/train.log
  resume -- ARGS     the same: a --workdir that exists is gone on with
  profile -- ARGS    train with --config.profile.steps=10:13 before ARGS
  logs               the last lines of train.log of all workers
  stop               SIGTERM: saves the step that it is at and ends
  ssh -- COMMAND     any command on all workers
  delete             the VM that `create` made
  dequeue            the queued resource, with its VMs

Flags, or variables of the environment:
  --name=NAME        TPU_NAME       of the VM or the queued resource
  --zone=ZONE        TPU_ZONE       such as us-east5-a
  --type=TYPE        TPU_TYPE       such as v5p-64 or v6e-32; create and queue
  --version=IMAGE    TPU_VERSION    the VM's image, such as v2-alpha-tpuv5; create and queue
  --project=PROJECT  TPU_PROJECT    default: gcloud's own
  --slices=N         TPU_SLICES     default 1; their VMs are NAME-0, NAME-1, ...
  --python=PROGRAM   TPU_PYTHON     3.11 or later on the VM; default python3.11
  --spot                            may be taken back at any time; create and queue
  --dry-run                         print the commands, run none
EOF
}

die() {
  echo "error: $1" >&2
  exit 2
}

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
command=$1
shift
name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} version=${TPU_VERSION:-}
project=${TPU_PROJECT:-} slices=${TPU_SLICES:-1} python=${TPU_PYTHON:-python3.11}
spot='' dry=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --spot) spot=--spot ;;
    --dry-run) dry=true ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) die "unknown flag $1; what the program gets stands behind --; see --help" ;;
  esac
  shift
done
[[ $command != --help && $command != -h && $command != help ]] || { usage; exit 0; }

need() {
  local flag
  for flag in "$@"; do
    [[ -n ${!flag} ]] || die "--$flag is missing for $command (or TPU_${flag^^})"
  done
}

run() {
  if $dry; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices is $slices; expected a number from 1"
place=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")
queued=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

# The VMs: one, or one a slice.
nodes() {
  local i
  if [[ $slices == 1 ]]; then
    echo "$name"
  else
    for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
  fi
}

# A command on all workers of all slices at the same time; fails if it fails on any.
everywhere() {
  local node pid pids=() failed=0
  for node in $(nodes); do
    local call=("${vm[@]}" ssh "$node" "${place[@]}" --worker=all --command="$1")
    if $dry; then
      run "${call[@]}"
    else
      "${call[@]}" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || failed=1; done
  return $failed
}

train() {
  [[ $# -gt 0 ]] || die "$command needs the arguments of launch/train.py behind --"
  local quoted
  quoted=$(printf '%q ' "$@")
  # Closed inputs and outputs let ssh go; the pid is what `stop` asks for.
  everywhere "cd ~/mgjax && { nohup .venv/bin/python launch/train.py ${quoted}> train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
}

need name zone
case $command in
  create)
    need type version
    [[ $slices == 1 ]] || die "create makes one slice; several: queue --slices=$slices"
    run "${vm[@]}" create "$name" "${place[@]}" --accelerator-type="$type" --version="$version" \
      ${spot:+"$spot"}
    ;;
  queue)
    need type version
    if [[ $slices == 1 ]]; then
      called=(--node-id="$name")
    else
      called=(--node-count="$slices" --node-prefix="$name")
    fi
    run "${queued[@]}" create "$name" "${place[@]}" --accelerator-type="$type" \
      --runtime-version="$version" "${called[@]}" ${spot:+"$spot"}
    ;;
  status) run "${queued[@]}" describe "$name" "${place[@]}" ;;
  copy)
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=${TMPDIR:-/tmp}/mgjax-$name.tgz
    run tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./work_dirs -czf "$archive" .
    for node in $(nodes); do
      run "${vm[@]}" scp "$archive" "$node:mgjax.tgz" "${place[@]}" --worker=all
    done
    everywhere "mkdir -p ~/mgjax && tar -xzf ~/mgjax.tgz -C ~/mgjax"
    run rm "$archive"
    ;;
  install)
    everywhere "cd ~/mgjax && $python -m venv .venv && .venv/bin/pip install -q -e '.[tpu,tensorboard]'"
    ;;
  train | resume) train "$@" ;;
  profile)
    [[ $# -gt 0 ]] || die "profile needs the arguments of launch/train.py behind --"
    train --config.profile.steps=10:13 "$@"
    ;;
  logs) everywhere "tail -n 20 ~/mgjax/train.log" ;;
  stop) everywhere "kill -TERM \$(cat ~/mgjax/train.pid)" ;;
  ssh)
    [[ $# -gt 0 ]] || die "ssh needs the command behind --"
    everywhere "$*"
    ;;
  delete) run "${vm[@]}" delete "$name" "${place[@]}" ;;
  dequeue) run "${queued[@]}" delete "$name" "${place[@]}" --force ;;
  *) die "unknown command $command; see --help" ;;
esac
