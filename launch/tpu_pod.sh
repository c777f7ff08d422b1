#!/bin/bash
# Trains on a TPU pod slice, as a queued resource, until it is done, whatever is preempted in between.
#
#   launch/tpu_pod.sh NAME ZONE v5litepod-64 CONFIG gs://BUCKET/runs/NAME [--config.x=y ...]
#
# Needs gcloud with a project; NAME is of the TPU and of its queued resource. Ask `python -m groupvit_jax.aot` first
# what the slice will need and how long it will take.
set -euo pipefail
name=$1 zone=$2 type=$3 config=$4 workdir=$5
shift 5
tpu() { gcloud compute tpus "$@" --zone="$zone" --quiet; }

create() {
  tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" --spot
  until [[ $(tpu queued-resources describe "$name" --format='value(state.state)') == ACTIVE ]]; do sleep 30; done
  # The working tree, without what git ignores, and its requirements, on every host.
  git archive --format=tar.gz --output=/tmp/groupvit.tar.gz HEAD
  tpu tpu-vm scp /tmp/groupvit.tar.gz "$name":groupvit.tar.gz --worker=all
  tpu tpu-vm ssh "$name" --worker=all --command='
    mkdir -p groupvit && tar -xzf groupvit.tar.gz -C groupvit && cd groupvit &&
    python3 -m venv .venv && .venv/bin/pip install --quiet -r requirements.txt "jax[tpu]" gcsfs'
}

while true; do
  tpu queued-resources describe "$name" >/dev/null 2>&1 || create
  # The same command on every host: JAX finds the others from the TPU's own metadata.
  code=0
  tpu tpu-vm ssh "$name" --worker=all --command="
    cd groupvit && .venv/bin/python train.py --config=$config --workdir=$workdir $*" || code=$?
  state=$(tpu queued-resources describe "$name" --format='value(state.state)' || echo GONE)
  case $code/$state in
    0/*) echo 'done'; tpu queued-resources delete "$name" --force; exit 0 ;;
    2/ACTIVE) echo 'the request has a mistake, see above' >&2; exit 2 ;;
    */ACTIVE) sleep 10 ;;  # a process was lost: start all again, from the last checkpoint
    *) tpu queued-resources delete "$name" --force || true ;;  # preempted: wait for another slice
  esac
done
