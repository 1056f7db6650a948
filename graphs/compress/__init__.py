"""Visual token compression at compile time: passes over a traced Program, each written `name{option=value,...}`."""
