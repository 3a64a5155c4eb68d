"""The only room with sockets: brokers, links and the courier that moves sealed messages."""
