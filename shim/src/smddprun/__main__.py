import sys

from smddprun.main import main

sys.exit(main())
