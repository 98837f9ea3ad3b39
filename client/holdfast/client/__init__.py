"""holdfast.client"""
