"""holdfast.coding"""
