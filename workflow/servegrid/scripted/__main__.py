"""The process of the scripted server."""

import sys

from servegrid.scripted.loop import Loop, serve
from servegrid.scripted.script import Script, from_json

serve(Loop(from_json(Script, sys.argv[1])))
