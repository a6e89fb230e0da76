"""The peer: Celery with late acks and a quorum queue. A task that does nothing but tell that it ran."""
import os
import time

from celery import Celery
from kombu import Exchange, Queue

app = Celery("tasks", broker=os.environ["PEER_BROKER"], backend=os.environ.get("PEER_BACKEND") or None)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=not os.environ.get("PEER_BACKEND"),
    task_queues=[
        Queue("celery", Exchange("celery"), routing_key="celery", durable=True, queue_arguments={"x-queue-type": "quorum"})
    ],
    task_default_queue="celery",
    task_default_queue_type="quorum",
    worker_detect_quorum_queues=True,
    worker_prefetch_multiplier=32,
    worker_send_task_events=False,
    broker_transport_options={"confirm_publish": True},
    broker_heartbeat=10,
)
RAN = os.open(os.environ["PEER_RAN"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)


@app.task
def nothing(payload):
    os.write(RAN, b".")


if __name__ == "__main__":
    import sys

    count, size = int(sys.argv[1]), int(sys.argv[2])
    payload = "x" * size
    start, before = time.time(), os.path.getsize(os.environ["PEER_RAN"])
    results = [nothing.delay(payload) for _ in range(count)]
    if os.environ.get("PEER_BACKEND"):
        for result in results:
            result.get(timeout=120)
    while os.path.getsize(os.environ["PEER_RAN"]) - before < count:
        time.sleep(0.002)
    print(time.time() - start)
