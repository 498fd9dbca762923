"""Whether two mathematical answers are equal, and where a completion's answer stands."""
