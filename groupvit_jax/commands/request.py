"""What eval.py is asked for about labelled pictures."""

from collections.abc import Mapping
import dataclasses

from groupvit_jax.eval import labelled, zero_shot
from groupvit_jax.train import open_run

SCENES = 'scenes'
BENCHMARKS = (*labelled.STORED_IN, labelled.FOLDER, SCENES, zero_shot.IMAGENET)


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for, as it is written on the command line.

  Attributes:
    benchmark: one of `BENCHMARKS`; 'scenes' are those that the run itself holds out for testing.
    data_dir: where TFDS data sets are kept, of 'folder' the folder itself, of 'imagenet' perhaps a pattern of tars; see
      `labelled_sets.open_benchmark` and `classified_sets.open_imagenet`. 'scenes' have none.
    num_pictures: so many, spread evenly; 0 for all.
    protocol: its name; '' for that of the benchmark's first published figure, or where there is none 'native'. Of
      'imagenet' always ''.
    changes: protocol parameters as people write them; of 'imagenet' `templates` alone.
    thresholds: further background thresholds, see `parse_thresholds`; not of 'imagenet'.
    output: folder for results; None for the table alone.
    overwrite: see `OutputFolder`; also whether `report` may replace a file that is no such page.
    masks: whether every picture's label map is written to `output`; not of 'imagenet'.
    report: path of a page for people; None for none; not of 'imagenet'.
    checkpoint: as for `trained_run.open_run`.
    weights: likewise.
  """

  benchmark: str
  data_dir: str = ''
  num_pictures: int = 0
  protocol: str = ''
  changes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  thresholds: str = ''
  output: str | None = None
  overwrite: bool = False
  masks: bool = False
  report: str | None = None
  checkpoint: str = open_run.NEWEST
  weights: open_run.Weights = 'best'
