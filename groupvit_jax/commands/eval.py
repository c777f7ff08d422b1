"""Scores a trained run on its held-out scenes or on a benchmark, or segments images with it.

python eval.py --workdir=runs/quickstart --output=runs/quickstart/eval
python eval.py --workdir=runs/released --benchmark=voc21 --data_dir=data --output=out
python eval.py --workdir=runs/released --benchmark=all --data_dir=data --class_names=groupvit,synonyms --output=out
python eval.py --workdir=runs/quickstart --images='*.png' --classes='dog,banana,grass' --output=out
python eval.py --workdir=EXPORT --runtime=openvino --images='*.png' --classes='dog,grass' --output=out
"""

from collections.abc import Callable
import json

from absl import flags

from groupvit_jax import cli
from groupvit_jax.eval import protocols
from groupvit_jax.running import cluster


def main() -> int:
  """Runs the command of the flags; returns the exit code."""
  if mistake := _find_mistake():
    return cli.fail(mistake)
  from groupvit_jax.commands import score, score_all, segment
  from groupvit_jax.eval import labelled
  from groupvit_jax.running import processes

  options = dict(
    output=OUTPUT.value,
    overwrite=OVERWRITE.value,
    protocol=PROTOCOL.value,
    checkpoint=CHECKPOINT.value,
    weights=WEIGHTS.value,
    runtime=RUNTIME.value,
    changes={key: flag.value for key, flag in CHANGES.items() if flag.value is not None},
  )
  if IMAGES.value is None:
    options |= dict(
      benchmark=BENCHMARK.value or labelled.SCENES,
      data_dir=DATA_DIR.value,
      num_pictures=NUM_PICTURES.value,
      thresholds=THRESHOLDS.value,
      masks=MASKS.value,
      report=REPORT.value,
      class_names=CLASS_NAMES.value,
    )
    several = BENCHMARK.value == score_all.ALL or ',' in PROTOCOL.value + CLASS_NAMES.value
    run = score_all.score_all if several else score.evaluate_benchmark
    evaluate = lambda: run(WORKDIR.value, score.Request(**options))
  else:
    options['protocol'] = PROTOCOL.value or protocols.NATIVE
    evaluate = lambda: segment.segment_images(
      WORKDIR.value, images=IMAGES.value, classes=CLASSES.value or '', **options
    )
  metadata = {'workdir': WORKDIR.value, 'request': json.dumps(options)}
  return processes.run(CLUSTER(), metadata, lambda: _hold_output(evaluate), saves=False)


def _hold_output(evaluate: Callable[[], int]) -> int:
  """Runs `evaluate` while no other command writes to --output; returns its exit code."""
  from groupvit_jax.running import folder_lock

  if OUTPUT.value is None:
    return evaluate()
  with folder_lock.hold(OUTPUT.value, '--output'):
    return evaluate()


def _find_mistake() -> str:
  """The mistake in a combination of flags; '' if there is none."""
  if IMAGES.value is None and CLASSES.value is not None:
    return '--classes are looked for in images; name those with --images'
  if IMAGES.value is not None and OUTPUT.value is None:
    return '--images needs --output: the folder that results go to'
  if IMAGES.value is not None and BENCHMARK.value is not None:
    return '--images and --benchmark are two requests; leave one out'
  for flag in (DATA_DIR, NUM_PICTURES, THRESHOLDS, MASKS, REPORT, CLASS_NAMES):
    if flag.value and IMAGES.value is not None:
      return f'--{flag.name} is about a benchmark, not about --images; leave one out'
  if DATA_DIR.value and BENCHMARK.value is None:
    return f'--data_dir={DATA_DIR.value} holds benchmarks; name one with --benchmark'
  return ''


if __name__ == '__main__':
  WORKDIR = flags.DEFINE_string(
    'workdir', None, "train.py's folder, whose newest whole checkpoint is used; or an export."
  )
  OUTPUT = flags.DEFINE_string('output', None, 'Results go here: a new folder, or one of an earlier eval.py.')
  OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Also accept an --output that holds other files.')
  IMAGES = flags.DEFINE_string('images', None, "Images to segment: a path or a pattern, as in '*.png'.")
  CLASSES = flags.DEFINE_string('classes', None, "Class names to look for in --images: 'dog|puppy,banana,grass'.")
  PROTOCOL = flags.DEFINE_string(
    'protocol',
    '',
    f'native, shifted, shifted+pamr or {", ".join(protocols.PROTOCOLS)}; by default that of the published result, '
    'shifted for scenes, else native. a,b,c scores several, in one pass where they cut images alike.',
  )
  WEIGHTS = flags.DEFINE_enum(
    'weights', 'best', ['best', 'ema', 'trained'], 'best: the moving average, where the run keeps one.'
  )
  RUNTIME = flags.DEFINE_string(
    'runtime', None, 'Of an ONNX export as --workdir: onnxruntime, openvino or openvino-bfloat16.'
  )
  CHANGES = {
    name: flags.DEFINE_string(f'protocol.{name}', None, 'Changes that part of the protocol.')
    for name in protocols.PARAMETERS
    if name != 'class_names'
  }
  CLASS_NAMES = flags.DEFINE_string(
    'class_names',
    '',
    "Names that a benchmark's classes are looked for by: benchmark, groupvit, synonyms, or a file; by default those of "
    'the protocol. a,b,c scores several in one pass.',
  )
  CLUSTER = cluster.define_flags()
  BENCHMARK = flags.DEFINE_string(
    'benchmark',
    None,
    'voc21, voc20, context60, context59, context459, coco_object, coco_stuff, ade20k, ade20k_847, cityscapes, folder, '
    "imagenet, all (those in --data_dir) or scenes (the run's own test scenes; the default): see docs/evaluation.md.",
  )
  DATA_DIR = flags.DEFINE_string('data_dir', '', "Where the benchmark's data set is; of --benchmark=folder the folder.")
  NUM_PICTURES = flags.DEFINE_integer('num_pictures', 0, 'So many images of the benchmark, spread evenly; 0 for all.')
  THRESHOLDS = flags.DEFINE_string('thresholds', '', 'Background thresholds to count along: 0.05:0.95:0.05 or 0.3,0.5.')
  CHECKPOINT = flags.DEFINE_enum(
    'checkpoint', 'newest', ['newest', 'best'], 'Which one of --workdir; best is the one that scored best in training.'
  )
  MASKS = flags.DEFINE_bool('masks', False, 'Write every label map of the benchmark as an indexed PNG.')
  REPORT = flags.DEFINE_string('report', None, 'Write an HTML page about the benchmark: out/report.html.')
  flags.mark_flag_as_required('workdir')
  cli.run(main)
