"""The ClientApp: trains on the partition that the node configuration names."""

from flwr.app import ArrayRecord, MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from . import model

app = ClientApp()


@app.train()
def train(message, context):
    partition = int(context.node_config["partition-id"])
    partitions = int(context.node_config["num-partitions"])
    points, labels = model.share(partition, partitions)
    print(f"trains on partition {partition} of {partitions}: {len(labels)} examples", flush=True)
    (weights,) = message.content["model"].to_numpy_ndarrays()
    weights = model.train(weights, points, labels)
    content = {
        "model": ArrayRecord([weights]),
        "facts": MetricRecord({"examples": len(labels), "partition": partition}),
    }
    return Message(RecordDict(content), reply_to=message)
