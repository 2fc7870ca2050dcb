"""A service for the jobs of one allocation: an HTTP server that counts requests."""

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


@contextlib.contextmanager
def serve(name, params, resources):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counter) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        env = {"COUNTER_URL": f"http://127.0.0.1:{server.server_port}"}
        try:
            yield SimpleNamespace(env=env, healthy=thread.is_alive)
        finally:
            server.shutdown()
