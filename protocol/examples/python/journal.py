"""What a worker must still know after a crash: the tasks it took on, and how those ended that nobody has confirmed."""

import base64
import fcntl
import json
import os


class Journal:
    """One JSON record a line, fsynced before anybody is told. A crash can only cut the last line short; it is dropped,
    for nobody was told of it. One process at a time can have a journal open."""

    def __init__(self, path):
        self.entries = {}
        self.lock = open(f"{path}.lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(path):
            with open(path, "rb") as file:
                for line in file.read().split(b"\n")[:-1]:
                    entry = json.loads(line)
                    self.entries[entry["task"]] = entry
        # Written anew with the last record of each task. Whoever lives long drops the oldest forgotten ones here.
        with open(f"{path}.new", "wb") as file:
            file.write(b"".join(self._line(entry) for entry in self.entries.values()))
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{path}.new", path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
        self.file = open(path, "ab", buffering=0)

    def admit(self, task, fence):
        """'run', after which the task is this worker's; 'stale' for what was taken on before; or the bytes of the end
        that this very attempt came to."""
        entry = self.entries.get(task)
        if entry and (fence < entry["fence"] or fence == entry["fence"] and entry["forgotten"]):
            return "stale"
        if entry and fence == entry["fence"] and entry["ended"]:
            return base64.b64decode(entry["ended"])
        self._append({"task": task, "fence": fence, "ended": None, "forgotten": False})
        return "run"

    def end(self, task, fence, event):
        """False when a later attempt has taken over: its end is not to be told."""
        if self.entries[task]["fence"] != fence:
            return False
        self._append(self.entries[task] | {"ended": base64.b64encode(event).decode()})
        return True

    def holds_end(self, task, fence):
        entry = self.entries.get(task)
        return entry is not None and entry["fence"] == fence and entry["ended"] is not None

    def forget(self, task):
        """The end is stored. The fence stays, so that a late copy of the task is not run again."""
        self._append(self.entries[task] | {"ended": None, "forgotten": True})

    def may_discard(self, task, fence):
        """Not a later attempt's work, nor an end that nobody has confirmed."""
        entry = self.entries.get(task)
        return entry is None or entry["fence"] <= fence and entry["ended"] is None

    def unconfirmed(self):
        return [base64.b64decode(entry["ended"]) for entry in self.entries.values() if entry["ended"]]

    @staticmethod
    def _line(entry):
        return json.dumps(entry).encode() + b"\n"

    def _append(self, entry):
        end = self.file.seek(0, os.SEEK_END)
        try:
            line = self._line(entry)
            if self.file.write(line) != len(line):
                raise OSError("the journal's record was cut short; is the disk full?")
            os.fsync(self.file.fileno())
        except OSError:
            # The next record must not follow half of this one.
            self.file.truncate(end)
            raise
        self.entries[entry["task"]] = entry
