"""Plans of the random schedule: the seed decides all, whatever begins ends, and faults don't get into each other's way."""

import unittest

import schedule


def text(steps):
    return [f"{at} {what} {subject.text if isinstance(subject, schedule.Fault) else subject}" for at, what, subject in steps]


class ScheduleTest(unittest.TestCase):
    def test_seed_decides(self):
        for kinds in (schedule.SINGLE, schedule.CLUSTER):
            self.assertEqual(text(schedule.plan(7, 120, kinds)), text(schedule.plan(7, 120, kinds)))
            self.assertNotEqual(text(schedule.plan(7, 120, kinds)), text(schedule.plan(8, 120, kinds)))

    def test_faults_fit(self):
        together = 0
        for seed in range(50):
            active, last = [], 0.0
            for at, what, fault in schedule.plan(seed, 120, schedule.SINGLE):
                self.assertGreaterEqual(at, last)
                last = at
                if what == "begin":
                    self.assertFalse(any(fault.holds & other.holds for other in active))
                    active.append(fault)
                    together = max(together, len(active))
                elif what == "end":
                    active.remove(fault)
            self.assertEqual(active, [])
            self.assertLess(last, 120 + 2 * max(schedule.LENGTHS))
        self.assertEqual(together, 2)

    def test_all_kinds_come(self):
        for kinds in (schedule.SINGLE, schedule.CLUSTER):
            plans = [schedule.plan(seed, 120, kinds) for seed in range(20)]
            begun = {fault.text.partition(":")[2].split(" ")[1] for steps in plans for _, what, fault in steps if what == "begin"}
            wanted = {kind(schedule.random.Random(seed)).text.partition(":")[2].split(" ")[1] for kind in kinds for seed in range(20)}
            self.assertEqual(begun, wanted)
            self.assertTrue(any(what == "cancel" for steps in plans for _, what, _ in steps))


if __name__ == "__main__":
    unittest.main()
