"""How fast lorakit is, how much memory it takes, and how near it comes to what is possible."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
