"""Adapts the pages to MkDocs: the README is the home page, the reference is made of docstrings."""

import pathlib
import re

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# Modules of the reference; other code is read in place.
_PUBLIC = (
  'predictor',
  'prediction',
  'eval.protocols',
  'model.build',
  'model.image_text',
  'model.vision',
  'model.text',
  'model.grouping',
  'model.assignment',
  'model.losses',
  'model.segmentation',
)


def on_files(files, config):
  """Adds the home page and the reference."""
  readme = (_ROOT / 'README.md').read_text(encoding='utf-8').replace('](docs/', '](')
  reference = '\n\n'.join(f'::: groupvit_jax.{name}' for name in _PUBLIC)
  for page, text in (('index.md', readme), ('api.md', f'# API\n\n{reference}\n')):
    files.append(File.generated(config, page, content=text))
  return files


def on_page_markdown(markdown, **_):
  """Drops the marks behind a block's language, which docs/check.py reads, and links to files that are no pages."""
  markdown = re.sub(r'^```(\w+) .*$', r'```\1', markdown, flags=re.MULTILINE)
  return re.sub(r'\[([^]]+)\]\((?:\.\./[^)]*|LICENSE|NOTICE)\)', r'\1', markdown)
