"""Components of a Dynamo deployment: the offload tier inside the worker, and the router in front of workers."""
