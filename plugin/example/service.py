"""A service that jobs of one allocation share: a tiny key-value server that counts."""

import contextlib
import http.server
import threading
from types import SimpleNamespace


class Counter(http.server.BaseHTTPRequestHandler):
    count = 0

    def do_GET(self):
        Counter.count += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(Counter.count).encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(name, params, resources):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counter) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield SimpleNamespace(
            env={"COUNTER_PORT": str(server.server_port)}, healthy=thread.is_alive
        )
        server.shutdown()
