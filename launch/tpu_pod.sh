#!/bin/bash
# Trains on a TPU pod slice, as a queued resource, until it is done, whatever is preempted in between.
#
#   launch/tpu_pod.sh NAME ZONE v5litepod-64 CONFIG gs://BUCKET/runs/NAME [--config.x=y ...]
#
# Needs gcloud with a project; NAME is of the TPU and of its queued resource. Ask `python -m groupvit_jax.aot` first
# what the slice will need and how long it will take. It may be ended and started again at any time: what is requested
# stays requested, and a run that still trains is asked to save first. Two variables may be set: RUNTIME, the image of
# the hosts, and PYTHON, the interpreter there.
set -euo pipefail
name=$1 zone=$2 type=$3 config=$4 workdir=$5
shift 5
command=$(printf '%q ' .venv/bin/python train.py --config="$config" --workdir="$workdir" "$@")
log=$(mktemp) complaint=$(mktemp) archive=$(mktemp)
trap 'rm -f "$log" "$complaint" "$archive"' EXIT

tpu() { gcloud compute tpus "$@" --zone="$zone" --quiet; }
everywhere() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }

state() {  # what cannot be found out, as when a login has expired, is asked again: it does not mean that there is none
  for _ in {1..100}; do
    if tpu queued-resources describe "$name" --format='value(state.state)' 2>"$complaint"; then return; fi
    if grep -q NOT_FOUND "$complaint"; then echo NONE; return; fi
    cat "$complaint" >&2
    echo "whether $name is there cannot be told; asked again" >&2
    sleep "${SECONDS_BETWEEN:-30}"
  done
  return 1
}

request() {
  tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" --spot
}

install() {  # the last commit and its requirements, on every host
  git diff --quiet HEAD || echo 'what is not committed is left out' >&2
  git archive --format=tar.gz --output="$archive" HEAD || exit 2
  tpu tpu-vm scp "$archive" "$name":groupvit.tar.gz --worker=all || return 1
  everywhere "
    python=${PYTHON:-python3}"'
    if ! $python -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
      echo "error: $python on $(hostname) is no Python 3.11 or later; name one that is there with PYTHON=python3.13," \
           "or an image that has one with RUNTIME=..."
      echo exit-code 2; exit 2
    fi
    mkdir -p groupvit && tar -xzf groupvit.tar.gz -C groupvit && cd groupvit && $python -m venv .venv &&
    .venv/bin/pip install --quiet -r requirements.txt "jax[tpu]" gcsfs || { echo exit-code 1; exit 1; }
    ' 2>&1 | tee "$log"
}

train() {  # the same command on every host: JAX finds the others from the TPU's own metadata
  : >"$log"
  everywhere '
    pid=$(cat groupvit.pid 2>/dev/null) || exit 0  # one that was left behind when a connection broke
    kill -TERM $pid 2>/dev/null; while kill -0 $pid 2>/dev/null; do sleep 1; done; rm groupvit.pid' || return 0
  install || return 0
  everywhere "
    cd groupvit; $command & pid=\$!; echo \$pid > ../groupvit.pid
    wait \$pid; code=\$?; rm -f ../groupvit.pid; echo exit-code \$code; exit \$code" 2>&1 | tee "$log" || true
}

restarts=0 errors=0
while true; do
  now=$(state)
  case $now in
    NONE) request ;;
    ACTIVE)
      train
      codes=$(sed -n 's/.*exit-code \([0-9]*\)$/\1/p' "$log" | sort -u | xargs)
      case " $codes " in
        ' 0 ') echo 'done'; tpu queued-resources delete "$name" --force; exit 0 ;;
        *' 2 '*) echo 'the request has a mistake, see above; the TPU is kept' >&2; exit 2 ;;
        *' 1 '* | *' 74 '*) errors=$((errors + 1)) ;;  # a defect, or the hardware's; a bucket that fails
        *) restarts=$((restarts + 1)) ;;  # a process was lost, or stopped
      esac  # all start again, from the last checkpoint
      if ((errors == 3 || restarts == 100)); then echo 'gave up, see above; the TPU is kept' >&2; exit 1; fi
      sleep "${SECONDS_BETWEEN:-30}" ;;
    FAILED) echo "the request failed; see: gcloud compute tpus queued-resources describe $name" >&2; exit 1 ;;
    SUSPENDED) tpu queued-resources delete "$name" --force || true ;;  # preempted: another slice is requested
    *) sleep "${SECONDS_BETWEEN:-30}" ;;  # accepted, waiting, provisioning, being taken away
  esac
done
