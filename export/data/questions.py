"""Questions to evaluate chat models with: everyday ones, and messages that the example family's target wrote."""

from pathlib import Path

# 144 first messages of users, written by SmolLM2-135M-Instruct (`draft-export family`, stage `questions`); no training
# text holds them. JSON lines.
HELD_OUT_CHATS = Path(__file__).with_name("held_out_chats.jsonl")
EVERYDAY_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Give me three tips for sleeping better.",
    "What is the difference between a virus and a bacterium?",
    "How can I remove a coffee stain from a shirt?",
    "Explain how a bicycle stays upright.",
    "Plan a simple vegetarian dinner for four people.",
    "Write a polite email that declines a meeting.",
    "What should I pack for a weekend in the mountains?",
    "How does a refrigerator work?",
)
