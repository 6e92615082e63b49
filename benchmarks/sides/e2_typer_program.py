"""A Typer program of one command, as small as it can be."""

import typer

app = typer.Typer()


@app.command()
def greet(name: str) -> None:
    """Greets somebody."""
    print(f"hello {name}")


app()
