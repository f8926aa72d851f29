"""Records as a LLaVA file holds them."""


def talk(*texts):
  return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]


def good(n):
  """n usable records: two of three with an image."""
  records = []
  for i in range(n):
    tag = "<image>\n" if i % 3 else ""
    records.append({"id": f"s{i}", "conversations": talk(f"{tag}Q {i}?", f"A {i}")})
    if tag:
      records[-1]["image"] = f"{i % 4}.png"
  return records
