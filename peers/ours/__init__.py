"""This project's artefacts as a contender, and what only its graphs can give: the float32 reference."""
