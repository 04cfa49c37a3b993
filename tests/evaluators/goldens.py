"""What other packages computed: `make_goldens_captions.py` wrote it."""

import json
from pathlib import Path

GOLDENS = json.loads(Path(__file__).with_name("goldens_captions.json").read_text())
