"""A server of the files of a folder on this machine."""

import threading
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves a folder; counts the downloads, and can stop in the middle of them."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.downloads = []
        self.half_sent, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def pause(self):
        """Lets the next downloads stop half-way until `go_on` is set."""
        self.half_sent.clear()
        self.go_on.clear()


class Handler(SimpleHTTPRequestHandler):
    """Sends a file in two halves, between which the server can pause."""

    def do_GET(self):
        self.server.downloads.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        half = len(content) // 2
        with suppress(ConnectionError):  # the other end was killed
            outputfile.write(content[:half])
            outputfile.flush()
            self.server.half_sent.set()
            self.server.go_on.wait(20)
            outputfile.write(content[half:])

    def log_message(self, *_):
        pass


@contextmanager
def serve(folder):
    """Gives a server of a folder that runs in a thread."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()
