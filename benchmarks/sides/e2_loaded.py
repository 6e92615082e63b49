"""Which heavy modules does `import stillhouse` load?"""

import json
import sys

import stillhouse

heavy = [m for m in ("torch", "pydantic", "numpy", "transformers") if m in sys.modules]
print(json.dumps({"count": len(heavy), "modules": heavy, "version": stillhouse.__version__}))
