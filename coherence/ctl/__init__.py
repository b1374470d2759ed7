"""coherencectl looks at a running coherenced, or at a table file; a module for each of its commands."""
