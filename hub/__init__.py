"""The way in from others' checkpoints and the way out to the Hub: conversion, model card, push."""
