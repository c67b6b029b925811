"""`python -m flows.cli`, as installed units and children of ours start the command."""

import _switchyard

_switchyard.main()
