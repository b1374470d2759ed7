"""What coherencectl asks and shows: a module for each of its commands, and the client that they share."""
