"""The process of the scripted server."""

import sys

from servegrid.mock_server.responses import Script, from_json
from servegrid.mock_server.server import Loop, serve

serve(Loop(from_json(Script, sys.argv[1])))
