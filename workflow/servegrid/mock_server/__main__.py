"""The process of the mock server."""

import sys

from servegrid.mock_server.responses import ResponseScript, script_from_json
from servegrid.mock_server.server import MockServerLoop, serve

serve(MockServerLoop(script_from_json(ResponseScript, sys.argv[1])))
