"""Where tests find the checkout, their helpers and, where they are present, the author's published data files."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
CHECKOUT = SUPPORT.parents[1]
PUBLISHED = Path(os.environ.get("REPLICATION_PUBLISHED") or CHECKOUT.parent / "shared" / "published")
