"""The server on Ray Serve: several engines behind one address. Needs the extra `ray`; `application` is the way in."""
