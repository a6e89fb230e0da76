"""The checker sees every kind of violation: good histories, edited in one place each."""

import pathlib
import shutil
import sqlite3
import tempfile
import unittest

import checker

DOMAIN = ("m1", "uuid-1", "digest-1")


class CheckerTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name) / "store.sqlite"
        self.store = sqlite3.connect(self.path)
        self.addCleanup(self.store.close)
        # Of the coordinator's tables what the witness looks at.
        self.store.executescript("""
            CREATE TABLE task (id TEXT PRIMARY KEY, state TEXT NOT NULL, fence INTEGER NOT NULL);
            CREATE TABLE event (
                task_id TEXT NOT NULL, fence INTEGER NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, at INTEGER NOT NULL,
                PRIMARY KEY (task_id, fence, seq, kind)) WITHOUT ROWID;
            """)
        checker.install(self.path)
        self.sequence = 0

    def task(self, task, *states):
        """A task's rows as the coordinator saves them, with fences after a colon."""
        for text in states:
            state, _, fence = text.partition(":")
            self.store.execute(
                "INSERT INTO task VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET state = excluded.state, fence = excluded.fence",
                (task, state, int(fence)))

    def event(self, task, kind, fence):
        self.sequence += 1
        # All in the same millisecond: no clock tells their order.
        self.store.execute("INSERT OR IGNORE INTO event VALUES (?, ?, ?, ?, 7)", (task, fence, self.sequence, kind))

    def attempt(self, task, fence, *steps):
        self.task(task, f"sent:{fence}")
        self.event(task, "accepted", fence)
        self.task(task, f"running:{fence}")
        for step in steps:
            self.event(task, f"permit:{step}", fence)

    def success(self, task, fence):
        self.event(task, "ended", fence)
        self.task(task, f"succeeded:{fence}")

    def history(self):
        """A migration whose conversion was taken over by a second attempt, after the first was permitted to publish."""
        self.task("m1-convert", "waiting:0")
        self.attempt("m1-convert", 1, "publish-disks")
        self.task("m1-convert", "waiting:1")
        self.attempt("m1-convert", 2, "publish-disks")
        self.event("m1-convert", "ended", 1)  # late, and of no effect
        self.success("m1-convert", 2)
        self.task("m1-deploy", "waiting:0")
        self.attempt("m1-deploy", 1, "define-domain")
        self.success("m1-deploy", 1)

    def found(self, *edits):
        """Kinds of what is found in a copy of the store that was edited."""
        self.store.commit()
        copy = self.path.with_name("copy.sqlite")
        shutil.copy(self.path, copy)
        edited = sqlite3.connect(copy)
        for edit in edits:
            self.assertGreater(edited.execute(edit).rowcount, 0, edit)
        edited.commit()
        edited.close()
        return checker.judge(checker.read(copy))

    def assert_found(self, kind, text, findings):
        self.assertTrue(any(each.startswith(f"{kind}: ") and text in each for each in findings), findings)

    def test_good(self):
        self.history()
        found = self.found()
        self.assertEqual(found, [])
        # The end of two fences and the permit of two.
        self.assertEqual(found.several(), 2)

    def test_done_again_on_request(self):
        self.history()
        self.task("m1-convert", "waiting:2")
        self.attempt("m1-convert", 3, "publish-disks")
        self.success("m1-convert", 3)
        self.task("m1-deploy", "waiting:1")
        self.attempt("m1-deploy", 2)  # a check
        self.success("m1-deploy", 2)
        self.assertEqual(self.found(), [])

    def test_taken_back_and_defined_again(self):
        self.history()
        self.task("m1-undeploy", "waiting:1")
        self.attempt("m1-undeploy", 2, "undefine-domain")
        self.success("m1-undeploy", 2)
        self.task("m1-deploy", "waiting:2")
        self.attempt("m1-deploy", 3, "define-domain")
        self.success("m1-deploy", 3)
        self.assertEqual(self.found(), [])
        self.assert_found("duplicate effect", "1 has defined it", self.found("DELETE FROM witness WHERE task = 'm1-undeploy'"))

    def test_lost_end(self):
        self.history()
        self.assert_found("lost", "told of no end", self.found(
            "DELETE FROM witness WHERE what = 'ended' AND fence = 2"))

    def test_end_of_another_fence(self):
        self.history()
        self.assert_found("lost", "told of no end", self.found(
            "UPDATE witness SET fence = 1 WHERE what = 'ended' AND fence = 2"))

    def test_lost_task(self):
        self.history()
        for state in ("running", "sent", "waiting"):
            self.assert_found("lost", f"{state} under fence 2", self.found(
                "DELETE FROM witness WHERE task = 'm1-convert' AND state = 'succeeded'",
                "DELETE FROM witness WHERE task = 'm1-convert' AND what = 'ended'",
                f"UPDATE witness SET state = '{state}' WHERE task = 'm1-convert' AND what = 'task' AND owner = 2"))

    def test_permit_to_a_stale_fence(self):
        self.task("m1-convert", "waiting:0")
        self.attempt("m1-convert", 1)
        self.task("m1-convert", "waiting:1", "sent:2")
        self.event("m1-convert", "permit:publish-disks", 1)
        self.event("m1-convert", "accepted", 2)
        self.task("m1-convert", "running:2")
        self.event("m1-convert", "permit:publish-disks", 2)
        self.success("m1-convert", 2)
        self.assert_found("stale-fence write", "permit:publish-disks for fence 1", self.found())

    def test_permit_without_a_lease(self):
        self.history()
        for state in ("sent", "waiting", "succeeded", "cancelled"):
            self.assert_found("stale-fence write", f"when it was {state}", self.found(
                f"UPDATE witness SET state = '{state}' WHERE what = 'permit:publish-disks' AND fence = 2"))

    def test_state_of_a_stale_fence(self):
        self.history()
        self.assert_found("stale-fence write", "2 was given out", self.found(
            "UPDATE witness SET owner = 1, fence = 1 WHERE task = 'm1-convert' AND state = 'succeeded'"))

    def test_fence_given_out_twice(self):
        self.history()
        self.assert_found("stale-fence write", "given out again under fence 1", self.found(
            "UPDATE witness SET owner = 1, fence = 1 WHERE task = 'm1-convert' AND owner = 2 AND state = 'sent'"))

    def test_fence_nobody_gave_out(self):
        self.history()
        self.assert_found("stale-fence write", "fence 5 was accepted", self.found(
            "UPDATE witness SET fence = 5 WHERE what = 'accepted' AND fence = 2"))

    def test_two_successes(self):
        self.history()
        self.success("m1-convert", 3)
        self.assert_found("duplicate effect", "succeeded under fence 3 after 2", self.found())

    def test_permit_after_success(self):
        self.history()
        self.attempt("m1-convert", 3, "publish-disks")
        self.success("m1-convert", 3)
        self.assert_found("duplicate effect", "publish-disks for fence 3 after 2", self.found())

    def test_defined_twice(self):
        self.history()
        self.task("m1-deploy", "waiting:1")
        self.attempt("m1-deploy", 2, "define-domain")
        self.success("m1-deploy", 2)
        self.assert_found("duplicate effect", "define-domain for fence 2, and 1", self.found())

    def domains(self, domains, defines):
        findings = self.found()
        checker.judge_domains(findings, {"web": DOMAIN}, domains, defines)
        return findings

    def test_domains(self):
        self.history()
        once = {"web": (1, 0, 0)}
        self.assertEqual(self.domains({"web": DOMAIN}, once), [])
        self.assert_found("lost", "web is not there", self.domains({}, {}))
        self.assert_found("duplicate effect", "other is of no migration",
                          self.domains({"web": DOMAIN, "other": DOMAIN}, once))
        for place, what in enumerate(("migration", "UUID", "manifest")):
            other = (*DOMAIN[:place], "another", *DOMAIN[place + 1:])
            self.assert_found("duplicate effect", f"has {what} another", self.domains({"web": other}, once))
        self.assert_found("duplicate effect", "2 times with 1 permits", self.domains({"web": DOMAIN}, {"web": (1, 1, 0)}))
        self.assert_found("duplicate effect", "added 2 times", self.domains({"web": DOMAIN}, {"web": (2, 0, 0)}))
        self.assert_found("duplicate effect", "removed 1 times", self.domains({"web": DOMAIN}, {"web": (1, 0, 1)}))
        self.assert_found("duplicate effect", "added 0 times", self.domains({"web": DOMAIN}, {}))


if __name__ == "__main__":
    unittest.main()
