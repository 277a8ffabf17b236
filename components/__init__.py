"""What runs in a Dynamo deployment: the offload tier inside the worker, and the router in front of it."""
