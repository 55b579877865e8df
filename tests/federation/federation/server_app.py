"""The ServerApp: federated averaging, with a log line per round that tests parse.

Flower's own strategies poll for replies every three seconds, which would be most of a round; this
one polls every 0.1 s.
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
        answers = train_round(grid, nodes, weights, number)
        facts = [answer["facts"] for answer in answers]
        received = [answer["model"].to_numpy_ndarrays()[0] for answer in answers]
        weights = np.average(received, axis=0, weights=[fact["examples"] for fact in facts])
        partitions = ",".join(str(fact) for fact in sorted(fact["partition"] for fact in facts))
        accuracy = model.accuracy(weights)
        result = f"partitions={partitions} accuracy={accuracy:.4f} at={time.time():.3f}"
        print(f"FEDERATION round={number} {result}", flush=True)


def connected(grid, wanted):
    """Waits for this many nodes and returns them."""
    while len(nodes := list(grid.get_node_ids())) < wanted:
        time.sleep(0.1)
    return nodes


def train_round(grid, nodes, weights, number):
    """Sends the weights to all nodes and returns their replies."""
    content = RecordDict({"model": ArrayRecord([weights])})
    messages = [
        Message(content, dst_node_id=node, message_type="train", group_id=str(number))
        for node in nodes
    ]
    waiting = set(grid.push_messages(messages))
    answers = []
    while waiting:
        time.sleep(0.1)
        for answer in grid.pull_messages(waiting):
            waiting.discard(answer.metadata.reply_to_message_id)
            if answer.has_error():
                raise RuntimeError(f"a node failed: {answer.error.reason}")
            answers.append(answer.content)
    return answers
