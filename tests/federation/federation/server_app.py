"""What the SuperLink does: federated averaging, and a line for each round that a test can read.

Flower's own strategies look for answers every three seconds, which would make up most of a round; this one does not wait.
"""

import time

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from . import model

app = ServerApp()


@app.main()
def main(grid, context):
    nodes = connected(grid, int(context.run_config["clients"]))
    weights = np.zeros(model.FEATURES)
    for number in range(1, int(context.run_config["rounds"]) + 1):
        answers = ask(grid, nodes, weights, number)
        facts = [answer["facts"] for answer in answers]
        received = [answer["model"].to_numpy_ndarrays()[0] for answer in answers]
        weights = np.average(received, axis=0, weights=[fact["examples"] for fact in facts])
        partitions = ",".join(str(partition) for partition in sorted(fact["partition"] for fact in facts))
        result = f"partitions={partitions} accuracy={model.accuracy(weights):.4f} at={time.time():.3f}"
        print(f"FEDERATION round={number} {result}", flush=True)


def connected(grid, wanted):
    """The nodes, once there are that many."""
    while len(nodes := list(grid.get_node_ids())) < wanted:
        time.sleep(0.1)
    return nodes


def ask(grid, nodes, weights, number):
    """Sends the weights to all nodes, and gives what each answered."""
    content = RecordDict({"model": ArrayRecord([weights])})
    questions = [Message(content, dst_node_id=node, message_type="train", group_id=str(number)) for node in nodes]
    waiting = set(grid.push_messages(questions))
    answers = []
    while waiting:
        time.sleep(0.1)
        for answer in grid.pull_messages(waiting):
            waiting.discard(answer.metadata.reply_to_message_id)
            if answer.has_error():
                raise RuntimeError(f"a node failed: {answer.error.reason}")
            answers.append(answer.content)
    return answers
