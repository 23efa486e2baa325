"""`python fake_server.py SETTINGS ENGINE`: the real server on the fake engine; two JSON objects.

Prints the server's URL on standard output as soon as the socket is bound.
"""

from __future__ import annotations

import json
import sys

from server.engine_loop import EngineLaunch
from server.serving import Server
from server.settings import ServerSettings

if __name__ == "__main__":
    settings = ServerSettings(**json.loads(sys.argv[1]))
    server = Server(settings, EngineLaunch(factory="fake_engine:build", arguments=json.loads(sys.argv[2])))
    print(server.url, flush=True)
    code = server.run()
    if server.failure:
        print(server.failure, file=sys.stderr)
    sys.exit(code)
