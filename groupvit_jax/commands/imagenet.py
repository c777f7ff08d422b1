"""What eval.py --benchmark=imagenet does: zero-shot classification."""

import jax

from groupvit_jax.commands.request import Request
from groupvit_jax.commands.run_metadata import describe_run, run_facts, say_replaced, write_board
from groupvit_jax.errors import UserError
from groupvit_jax.eval import classified, labelled, zero_shot
from groupvit_jax.eval.output_folder import OutputFolder
from groupvit_jax.train import open_run


def evaluate_imagenet(workdir: str, request: Request) -> int:
  """Scores a run on ImageNet and prints top-1 and top-5 accuracy; see `run_benchmark.evaluate_benchmark`."""
  if request.masks or request.thresholds or request.report or request.protocol or set(request.changes) - {'templates'}:
    raise UserError(zero_shot.NO_PROTOCOL)
  if not request.data_dir:
    raise UserError(f'--benchmark={zero_shot.IMAGENET} needs --data_dir: where its pictures are')
  folder = None if request.output is None else OutputFolder(request.output, overwrite=request.overwrite)
  source = labelled.take(classified.open_imagenet(request.data_dir), request.num_pictures)
  run = open_run.open_run(workdir, request.checkpoint, weights=request.weights)
  evaluator = zero_shot.build_evaluator(
    run.model, run.tokenizer, run.mesh, source, request.changes.get('templates', zero_shot.TEMPLATES)
  )
  if folder and jax.process_index() == 0:
    folder.begin()
  result = evaluator.evaluate(run.variables, provenance=run.provenance)
  if jax.process_index():
    return 0
  table = f'{result.table()}\n{describe_run(run)}'
  print(table)
  if folder:
    say_replaced(folder)
    facts = result.to_json() | run_facts(run) | {'num_pictures_asked_for': request.num_pictures}
    folder.write_text('table.txt', table + '\n')
    write_board(folder, result.scalars(), facts, {})
    folder.write_report(facts)
    print(f'written to {folder.path}')
  return 0
