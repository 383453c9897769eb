# An image with Ray and rayprune, for nodes of a cluster or a single machine:
#   docker build -t rayprune .
#   docker run --rm --shm-size=2g -v $PWD:/data rayprune rayprune run /data/job.yaml --out /data/runs/one
FROM rayproject/ray:2.60.0-py311
COPY --chown=ray . /home/ray/rayprune
RUN pip install --no-cache-dir "/home/ray/rayprune[cluster,train,gguf]"
