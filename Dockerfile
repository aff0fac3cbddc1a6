# stremn on a CPU, without gigabytes of CUDA.
#   docker build -t stremn .
#   docker run --rm -v "$PWD":/videos stremn segment clip.mp4 --mask first.png --out masks
FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir "/src[prompt]" && rm -rf /src
# Files that it writes belong to whoever runs it: docker run --user "$(id -u):$(id -g)" ...
RUN useradd --create-home stremn
USER stremn
ENV PYTHONUNBUFFERED=1
WORKDIR /videos
ENTRYPOINT ["stremn"]
CMD ["--help"]
