"""The control protocol between coherenced and its clients: messages, and the connection that carries them."""
