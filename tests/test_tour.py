"""The notebook runs from its first cell to its last, and keeps small outputs."""

import pathlib

import nbclient
import nbformat

from tests.trained import trained_workdir

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'examples' / 'tour.ipynb'


def test_the_tour_runs(monkeypatch):
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  kept = [cell.outputs for cell in notebook.cells if cell.cell_type == 'code']
  assert NOTEBOOK.stat().st_size < 300_000
  assert not any(output.output_type == 'error' for outputs in kept for output in outputs)
  assert '; runs/quickstart, step 7000, ' in kept[2][0].data['text/plain']  # and no path of the machine it ran on
  monkeypatch.setenv('GROUPVIT_WORKDIR', str(trained_workdir()))
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  place = {'metadata': {'path': str(ROOT / 'examples')}}
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3', resources=place).execute()
  outputs = [
    output.data for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs if 'data' in output
  ]
  assert sum('image/png' in data for data in outputs) == 5  # segments, groups, heat maps, thresholds, assignments
