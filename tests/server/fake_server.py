"""`python fake_server.py SETTINGS ENGINE CONSTANTS`: the real server on the fake engine; three JSON objects.

Constants are those of the server's modules by their full names, so that a test need not wait as long as an operator
would. Prints the server's URL on standard output as soon as the socket is bound.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib import import_module

from server.engine_loop import EngineLaunch
from server.serving import Server
from server.settings import ServerSettings

if __name__ == "__main__":
    for name, value in json.loads(sys.argv[3]).items():
        module, _, constant = name.rpartition(".")
        assert hasattr(import_module(module), constant)
        setattr(import_module(module), constant, value)
    settings = ServerSettings(**json.loads(sys.argv[1]))
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(message)s")
    server = Server(settings, EngineLaunch(factory="fake_engine:build", arguments=json.loads(sys.argv[2])))
    print(server.url, flush=True)
    code = server.run()
    if server.failure:
        print(server.failure, file=sys.stderr)
    sys.exit(code)
