"""``python -m dipguard.store FOLDER``: the size of a store, and what is to be removed from it."""

import sys

from dipguard.store.manage import main

sys.exit(main())
