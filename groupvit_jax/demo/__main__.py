"""Serves a page on which people segment images.

pip install -r requirements-demo.txt
python -m groupvit_jax.demo --workdir=runs/quickstart
"""

import importlib.util

from absl import flags

from groupvit_jax import cli
from groupvit_jax.eval import protocols

WORKDIR = flags.DEFINE_string('workdir', None, 'The run that segments.')
PROTOCOL = flags.DEFINE_string(
  'protocol',
  protocols.NATIVE,
  f'native, shifted, shifted+pamr, or {", ".join(protocols.PROTOCOLS)}: windows of 448 px.',
)
CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'newest', ['newest', 'best'], 'best: the one that scored best in training.'
)
HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at; 0.0.0.0 lets in the whole network.')
PORT = flags.DEFINE_integer('port', 7860, 'Port to listen at; 0 takes a free one.', 0, 65535)
UPLOAD = flags.DEFINE_integer('max_upload_mb', 20, 'Larger files are refused.', 1)
PIXELS = flags.DEFINE_float('max_megapixels', 24, 'Larger images are refused.', 0.01)
flags.mark_flag_as_required('workdir')


def main() -> int:
  if importlib.util.find_spec('gradio') is None:
    return cli.fail('the page needs Gradio: pip install -r requirements-demo.txt')
  from groupvit_jax.demo import server

  server.serve(
    WORKDIR.value,
    protocol=PROTOCOL.value,
    checkpoint=CHECKPOINT.value,
    host=HOST.value,
    port=PORT.value,
    max_upload_mb=UPLOAD.value,
    max_pixels=int(PIXELS.value * 1e6),
  )
  return 0


if __name__ == '__main__':
  cli.run(main)
