"""A TCP proxy that behaves as badly as it is told to."""

import select
import socket
import threading
import time


class ChaosProxy:
    """Forwards loopback connections to `target`. Modes: pass; delay (100 ms for each piece); reset (connections are
    reset, new ones as well); silence (nothing gets through, nothing is closed); half-open (towards the client nothing
    gets through); unheard (towards the broker nothing does)."""

    def __init__(self, target):
        self.target = target
        self.mode = "pass"
        self.ends = False
        self.pairs = set()
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ends = True
        self.listener.close()
        self.reset()

    def behave(self, mode):
        self.mode = mode
        if mode == "reset":
            self.reset()

    def reset(self):
        with self.lock:
            for pair in self.pairs:
                for end in pair:
                    # Closing with this option sends RST instead of FIN.
                    try:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        end.close()
                    except OSError:
                        pass
            self.pairs.clear()

    def accept(self):
        while not self.ends:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.mode == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
                continue
            try:
                broker = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                client.close()
                continue
            with self.lock:
                self.pairs.add((client, broker))
            threading.Thread(target=self.forward, args=(client, broker), daemon=True).start()

    def forward(self, client, broker):
        try:
            while True:
                if self.mode == "silence":
                    time.sleep(0.05)
                    continue
                ready, _, _ = select.select([client, broker], [], [], 0.2)
                for source in ready:
                    if self.mode == ("half-open" if source is broker else "unheard"):
                        time.sleep(0.05)
                        continue
                    piece = source.recv(65536)
                    if not piece:
                        return
                    if self.mode == "delay":
                        time.sleep(0.1)
                    (broker if source is client else client).sendall(piece)
        except (OSError, ValueError):
            pass
        finally:
            with self.lock:
                self.pairs.discard((client, broker))
            client.close()
            broker.close()
